"""Memory policy: which page holds which tokens. Torch-free; mapping is a platform's business."""
