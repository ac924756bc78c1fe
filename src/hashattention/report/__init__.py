"""Results for people: tables (`table`), plots (`plots`) and pages (`page`)."""
