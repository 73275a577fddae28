"""How evidence is found: in the coordinator's home, at an owner's place, in files that may hold markers."""
