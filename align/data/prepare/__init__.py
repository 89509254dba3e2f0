"""What is done to data before any stage reads it: row by row, over all rows, and told in a report."""
