"""Trains the live part of a prepared model."""
