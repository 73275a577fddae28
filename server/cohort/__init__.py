"""Who is in a run: its members, how they join, who is asked, who is left out, and why."""
