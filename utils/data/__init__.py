"""What is learned from: images, splits, folders, task streams."""
