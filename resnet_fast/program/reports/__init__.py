"""What a run says and writes about itself: lines, logs, traces."""
