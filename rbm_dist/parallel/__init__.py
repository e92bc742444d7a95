"""Many ranks as one: the mesh, global-batch reductions, sharded checkpoints. `torch.distributed`, no Ray."""
