"""How good the features are: nearest neighbours, few labels, linear classifiers."""
