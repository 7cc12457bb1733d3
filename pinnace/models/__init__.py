"""Models: where they are found, how they are downloaded, and the predictor for image classifiers."""
