"""What people see on the terminal: progress, summaries, the doctor's advice."""
