"""From input to a staged graph: tables, npz, OGB, PyG, synthetic; ids, columns and splits."""
