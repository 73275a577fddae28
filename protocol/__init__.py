"""What all sides agree on: plan, messages, encoding, accounting, errors. No sockets, no torch."""
