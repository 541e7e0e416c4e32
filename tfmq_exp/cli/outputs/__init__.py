"""What a run leaves in its folder, on the terminal and on the dashboard."""
