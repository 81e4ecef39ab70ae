"""FS-DINO: few-shot segmentation with a frozen encoder and a light, prompted segmenter (tensors only)."""
