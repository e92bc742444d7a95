"""The student at work: its artifact, and predictions from features alone."""
