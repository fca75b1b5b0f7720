"""The web page that the server shows: plain files, made without a build step; they load nothing from elsewhere."""
