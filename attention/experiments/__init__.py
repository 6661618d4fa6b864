"""What a lecture trains for itself alone. Experiments import mechanisms, never the other way round."""
