"""What ties statecache to other programs."""
