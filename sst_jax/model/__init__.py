"""The model: configs, the decoder block, the stream's state, and the forwards."""
