"""L3: where images live when memory is gone."""
