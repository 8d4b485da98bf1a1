"""Everything that knows of more than one device: the mesh, where weights live, and who sends what to whom."""
