"""Other libraries, each through its own extension points."""
