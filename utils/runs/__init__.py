"""What a run is on disk: identity, manifest, checkpoint, paths."""
