"""Models of torchvision and timm, divided and trained as their users would; what was seen is docs/models.md."""
