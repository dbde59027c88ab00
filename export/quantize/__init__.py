"""What quantization needs of a checkpoint: calibration, sensitivity, and the placement of bits."""
