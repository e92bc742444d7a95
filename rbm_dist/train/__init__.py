"""What training is made of, apart from the model and the graph."""
