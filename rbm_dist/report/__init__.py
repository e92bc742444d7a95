"""What a person looks at: the results table, progress bars, metrics files."""
