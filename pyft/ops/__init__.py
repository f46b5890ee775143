"""The public ops: one file each with checks, autograd and the public function."""
