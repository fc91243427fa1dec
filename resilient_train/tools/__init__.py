"""L4: what people do with checkpoints from a command line; `resilient_train.launch.rtctl` parses and prints."""
