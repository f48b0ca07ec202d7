"""Handing a trained model on in the formats of others."""
