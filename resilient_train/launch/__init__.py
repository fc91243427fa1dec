"""L5: command lines."""

from resilient_train import config

# Before torch is loaded, which reads it once.
config.prepare_launcher()
