//! What ids, names and payloads may be, so that every database can hold and compare them.

use crate::payload::EncodeError;

/// The longest name of a step, value, timer, event or kind, in UTF-16 units.
pub const MAX_NAME: usize = 128;
/// The longest process id, record key or message id, in UTF-16 units.
pub const MAX_ID: usize = 256;
/// The longest namespace, in UTF-16 units.
pub const MAX_NAMESPACE: usize = 64;
/// The default limit of one payload, in bytes of JSON.
pub const DEFAULT_PAYLOAD: usize = 1024 * 1024;

/// Something given is outside what every storage can hold. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// It is empty.
    #[error("the {what} is empty; give it 1 to {allowed} characters")]
    Empty {
        /// What was given: `process id`, `step name`.
        what: &'static str,
        /// The limit.
        allowed: usize,
    },
    /// It is too long.
    #[error("the {what} {start:?}… has {given} UTF-16 units; at most {allowed} are allowed")]
    TooLong {
        /// What was given.
        what: &'static str,
        /// How it starts.
        start: Box<str>,
        /// Its length in UTF-16 units.
        given: usize,
        /// The limit.
        allowed: usize,
    },
    /// It holds a control character.
    #[error("the {what} {text:?} holds the control character {character:?}; control characters are not allowed")]
    Control {
        /// What was given.
        what: &'static str,
        /// The text.
        text: Box<str>,
        /// The character.
        character: char,
    },
    /// It starts or ends with white space, which some databases ignore when they compare.
    #[error("the {what} {text:?} starts or ends with white space; trim it")]
    Blank {
        /// What was given.
        what: &'static str,
        /// The text.
        text: Box<str>,
    },
    /// A payload is too large.
    #[error(
        "the {what} is {given} bytes of JSON; at most {allowed} are allowed (`HostBuilder::max_payload` changes it)"
    )]
    Payload {
        /// What was given: `input`, `message`.
        what: &'static str,
        /// Its size in bytes.
        given: usize,
        /// The limit.
        allowed: usize,
    },
    /// A payload is a value that JSON cannot bring back.
    #[error("the {what} cannot be recorded: {why}")]
    Encode {
        /// What was given.
        what: &'static str,
        /// Why.
        why: EncodeError,
    },
}

/// Checks a text that becomes part of a key.
pub(crate) fn check(what: &'static str, text: &str, allowed: usize) -> Result<(), LimitError> {
    if text.is_empty() {
        return Err(LimitError::Empty { what, allowed });
    }
    // A char has at most as many UTF-16 units as bytes, so short texts need no second look.
    if text.len() > allowed {
        let given = text.encode_utf16().count();
        if given > allowed {
            let start = text.chars().take(24).collect::<String>().into();
            return Err(LimitError::TooLong { what, start, given, allowed });
        }
    }
    if let Some(character) = text.chars().find(|c| c.is_control()) {
        return Err(LimitError::Control { what, text: text.into(), character });
    }
    if text.trim() != text {
        return Err(LimitError::Blank { what, text: text.into() });
    }
    Ok(())
}

/// Checks the name of a record, and its key if it has one.
pub(crate) fn check_name(name: &str, key: &str) -> Result<(), LimitError> {
    check("name", name, MAX_NAME)?;
    // The engine's own keys have a sign in front.
    if key.is_empty() { Ok(()) } else { check("key", key, MAX_ID + 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused() {
        assert_eq!(check("id", "", 4), Err(LimitError::Empty { what: "id", allowed: 4 }));
        assert!(matches!(check("id", "abcde", 4), Err(LimitError::TooLong { given: 5, .. })));
        assert!(matches!(check("id", "a\0b", 4), Err(LimitError::Control { character: '\0', .. })));
        assert!(matches!(check("id", "a\n", 4), Err(LimitError::Control { .. })));
        assert!(matches!(check("id", " a", 4), Err(LimitError::Blank { .. })));
        // Four bytes each, two UTF-16 units each.
        assert_eq!(check("id", "😀😀", 4), Ok(()));
        assert!(matches!(check("id", "😀😀😀", 4), Err(LimitError::TooLong { given: 6, .. })));
        assert_eq!(check("id", "é'\"\u{202e}", 8), Ok(()));
    }
}
