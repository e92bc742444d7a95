"""Plain torch modules: the teacher (GraphSAGE) and the students (MLP, RbM)."""
