"""Official TensorFlow checkpoints, read without TensorFlow."""
