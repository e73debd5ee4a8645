"""Trains the living part of a prepared model."""
