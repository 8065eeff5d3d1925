"""What is kept of runs, and with their videos."""
