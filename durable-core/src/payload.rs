//! Values to JSON text and back. What JSON could not bring back is refused when it is recorded, not found out at the
//! resume.

use serde::de::DeserializeOwned;
use serde::ser::{self, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use uuid::Uuid;

/// Why a value cannot be recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EncodeError(Box<str>);

/// How deep arrays and objects may lie within each other: deeper ones are not read back.
const MAX_DEPTH: usize = 127;

/// The JSON text of a value that the program gives.
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Box<str>, EncodeError> {
    let text = encode_record(value)?;
    let depth = depth(&text);
    if depth > MAX_DEPTH {
        return Err(EncodeError(format!("its JSON is {depth} levels deep; at most {MAX_DEPTH} are allowed").into()));
    }
    Ok(text)
}

/// The same, to stand in a record of the engine's own.
pub(crate) fn encode_raw<T: Serialize + ?Sized>(value: &T) -> Result<Box<RawValue>, EncodeError> {
    RawValue::from_string(encode(value)?.into()).map_err(|e| EncodeError(e.to_string().into()))
}

/// The JSON text of a record of the engine's own, which may hold a value that the program gave: as it stands, however deep.
pub(crate) fn encode_record<T: Serialize + ?Sized>(value: &T) -> Result<Box<str>, EncodeError> {
    let text = serde_json::to_string(value).map_err(|e| EncodeError(e.to_string().into()))?;
    // serde_json writes NaN and the infinities as null, and `Some(())`: they look like `None` afterwards.
    if text.contains("null") {
        value.serialize(Lossless).map_err(|e| EncodeError(e.0.into()))?;
    }
    Ok(text.into())
}

/// The JSON text of a value together with what a resume will make of it. Operations return the latter, so a process
/// never sees a value that it would not see again.
pub(crate) fn encode_back<T: Serialize + DeserializeOwned>(value: T) -> Result<(Box<str>, T), EncodeError> {
    let text = encode(&value)?;
    let back = serde_json::from_str(&text).map_err(|e| {
        EncodeError(format!("its JSON does not read back as {}: {}", std::any::type_name::<T>(), reason(&e)).into())
    })?;
    Ok((text, back))
}

/// How deep arrays and objects lie within each other.
fn depth(text: &str) -> usize {
    let opening = |byte: &u8| matches!(byte, b'[' | b'{');
    // Most have too few brackets to be worth a closer look.
    if text.len() <= 2 * MAX_DEPTH || text.as_bytes().iter().filter(|byte| opening(byte)).count() <= MAX_DEPTH {
        return 0;
    }
    let (mut depth, mut deepest, mut quoted, mut escaped) = (0_usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Which type was expected, and why the text is not one.
pub(crate) fn decode<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text)
        .map_err(|e| format!("expected {}, found {}: {}", std::any::type_name::<T>(), shape(text), reason(&e)))
}

/// What serde says of a text, without the values that it quotes: they may be secrets.
fn reason(error: &serde_json::Error) -> String {
    let said = error.to_string();
    // Of a text that is no JSON nothing is quoted; and these name what stands in the code.
    if !error.is_data() || said.starts_with("missing field `") || said.starts_with("duplicate field `") {
        return said;
    }
    for what in ["invalid type", "invalid value", "invalid length", "unknown variant", "unknown field"] {
        // What was expected stands in the code, too; what was found stands before it.
        if let (true, Some((_, expected))) = (said.starts_with(what), said.rsplit_once(", expected ")) {
            return format!("{what}, expected {expected}");
        }
    }
    "its `Deserialize` refuses it".into()
}

/// What a JSON text looks like, without its values: they may be secrets.
fn shape(text: &str) -> String {
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(serde_json::Value::Null) => "null".into(),
        Ok(serde_json::Value::Bool(_)) => "a boolean".into(),
        Ok(serde_json::Value::Number(_)) => "a number".into(),
        Ok(serde_json::Value::String(_)) => "a string".into(),
        Ok(serde_json::Value::Array(a)) => format!("an array of {}", a.len()),
        Ok(serde_json::Value::Object(o)) => {
            let names: Vec<&str> = o.keys().map(String::as_str).take(8).collect();
            format!("an object with {names:?}")
        }
        Err(_) => format!("{} bytes that are not JSON", text.len()),
    }
}

/// A digest of the canonical form of a JSON text: key order and white space do not count.
pub(crate) fn digest(text: &str) -> Box<str> {
    let mut canonical = String::with_capacity(text.len());
    canonicalise(text, &mut canonical);
    Uuid::new_v5(&Uuid::NAMESPACE_OID, canonical.as_bytes()).simple().to_string().into()
}

/// Part by part as text, since a `serde_json::Value` rounds integers beyond 64 bits.
fn canonicalise(text: &str, out: &mut String) {
    let text = text.trim_ascii();
    match text.as_bytes().first() {
        Some(b'[') => {
            let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(text) else { return out.push_str(text) };
            out.push('[');
            for item in items {
                canonicalise(item.get(), out);
                out.push(',');
            }
            out.push(']');
        }
        Some(b'{') => {
            let Ok(fields) = serde_json::from_str::<BTreeMap<String, &RawValue>>(text) else {
                return out.push_str(text);
            };
            out.push('{');
            for (name, item) in fields {
                let _ = write!(out, "{name:?}:");
                canonicalise(item.get(), out);
                out.push(',');
            }
            out.push('}');
        }
        _ => out.push_str(text),
    }
}

/// A serializer that writes nothing and refuses what JSON would bring back as something else: floating-point numbers that
/// it has no text for, and a `Some` that looks like `None`. It tells whether the text is `null`.
struct Lossless;

#[derive(Debug)]
struct Loss(String);

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Loss {}
impl ser::Error for Loss {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

macro_rules! ignore {
    ($($name:ident: $t:ty),*) => { $(fn $name(self, _: $t) -> Result<bool, Loss> { Ok(false) })* };
}
macro_rules! compound {
    ($($trait:ident { $($method:ident($($arg:ident: $t:ty),*)),* }),*) => {
        $(impl ser::$trait for Lossless {
            type Ok = bool;
            type Error = Loss;
            $(fn $method<T: Serialize + ?Sized>(&mut self, $($arg: $t,)* value: &T) -> Result<(), Loss> {
                value.serialize(Lossless).map(drop)
            })*
            fn end(self) -> Result<bool, Loss> { Ok(false) }
        })*
    };
}

impl ser::Serializer for Lossless {
    type Ok = bool;
    type Error = Loss;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    ignore!(serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_char: char,
        serialize_str: &str, serialize_bytes: &[u8]);

    fn serialize_f32(self, v: f32) -> Result<bool, Loss> {
        self.serialize_f64(f64::from(v))
    }
    fn serialize_f64(self, v: f64) -> Result<bool, Loss> {
        if v.is_finite() { Ok(false) } else { Err(Loss(format!("JSON has no text for the number {v}"))) }
    }
    fn serialize_none(self) -> Result<bool, Loss> {
        Ok(true)
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<bool, Loss> {
        if value.serialize(self)? {
            return Err(Loss(
                "a `Some` of what is null in JSON reads back as `None`; use an enum, or a struct with a field".into(),
            ));
        }
        Ok(false)
    }
    fn serialize_unit(self) -> Result<bool, Loss> {
        Ok(true)
    }
    fn serialize_unit_struct(self, _: &'static str) -> Result<bool, Loss> {
        Ok(true)
    }
    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<bool, Loss> {
        Ok(false)
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<bool, Loss> {
        value.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<bool, Loss> {
        value.serialize(self)?;
        Ok(false)
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<Self, Loss> {
        Ok(self)
    }
    fn serialize_tuple(self, _: usize) -> Result<Self, Loss> {
        Ok(self)
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self, Loss> {
        Ok(self)
    }
    fn serialize_tuple_variant(self, _: &'static str, _: u32, _: &'static str, _: usize) -> Result<Self, Loss> {
        Ok(self)
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Self, Loss> {
        Ok(self)
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self, Loss> {
        Ok(self)
    }
    fn serialize_struct_variant(self, _: &'static str, _: u32, _: &'static str, _: usize) -> Result<Self, Loss> {
        Ok(self)
    }
}

compound!(SerializeSeq { serialize_element() }, SerializeTuple { serialize_element() },
    SerializeTupleStruct { serialize_field() }, SerializeTupleVariant { serialize_field() },
    SerializeStruct { serialize_field(_name: &'static str) },
    SerializeStructVariant { serialize_field(_name: &'static str) },
    SerializeMap { serialize_key(), serialize_value() });

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, HashMap};

    #[test]
    fn what_json_cannot_bring_back_is_refused() {
        assert!(encode(&f64::NAN).is_err());
        assert!(encode(&Some(f32::INFINITY)).is_err());
        assert!(encode(&vec![Some((1, f64::NEG_INFINITY))]).is_err());
        assert!(encode(&HashMap::from([(vec![1], 2)])).is_err());
        assert!(encode(&BTreeMap::from([(1, None::<u8>)])).is_ok());
        assert!(encode(&Some(())).is_err() && encode(&vec![Some(None::<u8>)]).is_err());
        assert!(
            encode(&None::<()>).is_ok() && encode(&Some(Some(1))).is_ok() && encode(&Some((None::<u8>, ()))).is_ok()
        );
        assert_eq!(&*encode(&(None::<u8>, 1.5, "null")).unwrap(), r#"[null,1.5,"null"]"#);

        #[derive(serde::Serialize, serde::Deserialize)]
        struct Lossy {
            #[serde(skip_serializing)]
            _needed: u8,
        }
        let error = encode_back(Lossy { _needed: 1 }).err().unwrap().to_string();
        assert!(error.contains("Lossy") && error.contains("missing field"), "{error}");
    }

    #[test]
    fn a_decode_error_names_both_types_and_no_value() {
        let error = decode::<u32>(r#"{"iban":"DE12"}"#).unwrap_err();
        assert!(error.contains("expected u32") && error.contains("iban") && !error.contains("DE12"), "{error}");
    }

    #[test]
    fn no_error_quotes_a_value() {
        #[derive(Debug, serde::Serialize, serde::Deserialize)]
        enum Known {
            A,
            B,
        }
        #[derive(Debug, serde::Deserialize)]
        struct Picky(#[serde(deserialize_with = "picky")] ());
        fn picky<'de, D: serde::Deserializer<'de>>(text: D) -> Result<(), D::Error> {
            let text: &str = serde::Deserialize::deserialize(text)?;
            Err(serde::de::Error::custom(format!("{text} is not what it should be")))
        }
        let errors = [
            decode::<u32>(r#""hidden, expected \"hidden\"""#).unwrap_err(),
            decode::<Known>(r#""hidden""#).unwrap_err(),
            decode::<(u32, char)>(r#"[1,"hidden"]"#).unwrap_err(),
            decode::<Uuid>(r#""hidden""#).unwrap_err(),
            decode::<Picky>(r#""hidden""#).unwrap_err(),
            decode::<bool>("4711").unwrap_err(),
            decode::<u8>("4711").unwrap_err(),
            decode::<i32>("4711.5").unwrap_err(),
            decode::<u32>("hidden").unwrap_err(),
        ];
        for error in &errors {
            assert!(!error.contains("hidden") && !error.contains("4711"), "{error}");
        }
        assert!(errors[0].ends_with("found a string: invalid type, expected u32 at line 1 column 29"), "{}", errors[0]);
        assert!(errors[1].contains("unknown variant, expected `A` or `B`"), "{}", errors[1]);
        assert!(errors[4].contains("its `Deserialize` refuses it"), "{}", errors[4]);
        assert!(encode_back(Known::A).is_ok() && encode(&Known::B).is_ok());
    }

    #[test]
    fn what_is_too_deep_to_be_read_back() {
        let nested = |depth: usize, core: &str| format!("{}{core}{}", "[".repeat(depth), "]".repeat(depth));
        let raw = |text: String| RawValue::from_string(text).unwrap();
        for depth in [MAX_DEPTH, MAX_DEPTH + 1] {
            let text = nested(depth, r#""\"]]]{{{[[[\\""#);
            let readable = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            assert_eq!(encode(&raw(text)).is_ok(), readable, "{depth}");
        }
        let error = encode(&raw(nested(100_000, "1"))).unwrap_err().to_string();
        assert_eq!(error, "its JSON is 100000 levels deep; at most 127 are allowed");
        // Wide is not deep.
        assert!(encode(&vec![[[0_u8; 0]; 2]; 1000]).is_ok());
    }

    #[test]
    fn a_digest_does_not_see_order_or_space() {
        assert_eq!(digest(r#"{"a":1,"b":[1,2]}"#), digest(r#"{ "b": [1, 2], "a": 1 }"#));
        assert_ne!(digest(r#"{"a":1}"#), digest(r#"{"a":"1"}"#));
        assert_ne!(digest("[1,2]"), digest("[2,1]"));
        assert_ne!(digest(r#"["a,b"]"#), digest(r#"["a","b"]"#));
    }

    #[test]
    fn a_digest_sees_every_digit() {
        assert_ne!(digest(&format!("[{}]", u128::MAX)), digest(&format!("[{}]", u128::MAX - 1)));
        assert_ne!(digest("18446744073709551616"), digest("18446744073709551617"));
    }

    proptest::proptest! {
        #[test]
        fn numbers_come_back_as_they_were(int in proptest::num::i64::ANY, float in proptest::num::f64::NORMAL) {
            proptest::prop_assert_eq!(encode_back((int, float)).unwrap().1, (int, float));
        }
    }
}
