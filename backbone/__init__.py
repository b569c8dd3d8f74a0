"""The frozen ViT, LuCA and the cosine classifier."""
