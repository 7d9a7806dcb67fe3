"""Features moved to object detection: Faster R-CNN on a pretrained ResNet, all of it trained."""
