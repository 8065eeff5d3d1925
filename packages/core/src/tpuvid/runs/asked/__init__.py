"""What was asked for: prompts, sweeps, requests and the names of videos."""
