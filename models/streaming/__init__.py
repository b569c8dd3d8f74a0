"""Classifiers from streamed statistics: they are no learners, learners use them."""
