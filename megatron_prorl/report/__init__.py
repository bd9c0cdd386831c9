"""What people look at: runs and evaluations as one HTML page, with the same figures and tables as files."""
