"""What happens when a training run starts: flags, patches, the banner."""
