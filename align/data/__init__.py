"""Loading and converting datasets, and rendering conversations with answer masks."""
