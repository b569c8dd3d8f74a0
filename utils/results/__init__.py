"""What a run tells: numbers, tables, pictures."""
