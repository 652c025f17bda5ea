"""The families of decoders whose checkpoints are read and written, one file each; `registry` looks them up."""
