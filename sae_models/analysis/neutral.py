"""Beginnings of texts about nothing in particular: a steered model is free to go on about any topic."""

PROMPTS = (
    "From my experience,", "In this section, we", "One of the most important", "It is well known that",
    "The first thing to understand is", "For many years, people", "There are several reasons why", "As we have seen,",
    "A good example of this is", "Most people agree that", "In the past,", "The main purpose of",
    "Consider the case of",
    "At the beginning of the", "What do you think about", "The following table shows", "In general,", "Over time,",
    "Some researchers believe that", "It is often said that", "The second part of", "Another way to look at",
    "The difference between the two", "When we talk about", "This chapter describes", "To answer this question,",
    "An important part of", "Many students ask", "In recent years,", "The most common type of", "On the other hand,",
    "Suppose that you", "The word itself comes from", "According to the author,", "After a long time,",
    "The best known of these", "Before we begin,", "In other words,", "The results of the study", "Each of these",
    "As a result of", "The term is used", "Let us look at", "During the last century,", "Like many others,",
    "The history of", "The simplest way to", "Not everyone agrees with", "In the figure below,", "The next step is to",
    "A number of different", "These days,", "Although it may seem", "The idea that", "In most cases,",
    "How can we explain", "The role of", "If you look closely,", "People sometimes", "It took a long time",
    "The problem with", "In the middle of", "Two things are", "Finally, it is worth",
)  # fmt: skip
