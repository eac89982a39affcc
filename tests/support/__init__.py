"""What several kinds of tests share: real servers, a faulty network, waiting."""
