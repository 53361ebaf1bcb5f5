"""What a program shows: plots and self-contained pages."""
