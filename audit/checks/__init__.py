"""The judgement of a report: its checks and its verdict, pure functions of its sections."""
