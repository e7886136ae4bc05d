"""The federation as a Flower app. It runs where fedlpp_ray is not installed."""
