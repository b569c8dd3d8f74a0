"""The feature bank: rows on disk, the images that are missing, the extraction that fills it."""
