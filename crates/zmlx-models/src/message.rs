//! Messages of a conversation.

use serde::{Deserialize, Serialize};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what else the chat template knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// Reasoning that the template wants apart from the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
}

/// The tags of GPT-OSS's channels.
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";

impl ChatMessage {
    /// A message of that role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), thinking: None }
    }

    /// What a model wrote, as its template takes it in later turns. Tags of tool calls and of reasoning (`<think>`) stay in
    /// the text, where templates look for them. Only the channels of GPT-OSS are taken apart: its template refuses text with
    /// these tags, and has the channel `analysis` as [`Self::thinking`].
    pub fn reply(text: &str) -> Self {
        let Some(channels) = text.strip_prefix(CHANNEL) else { return Self::new("assistant", text) };
        let (mut content, mut thinking) = (String::new(), String::new());
        for part in channels.split(CHANNEL) {
            // Between two messages stand the end of the one and the role of the other.
            let Some((name, rest)) = part.split_once(MESSAGE) else { continue };
            let body = rest.find("<|").map_or(rest, |end| &rest[..end]);
            let into = if name.trim_start().starts_with("analysis") { &mut thinking } else { &mut content };
            into.push_str(body);
        }
        let thinking = (!thinking.is_empty()).then_some(thinking);
        Self { thinking, ..Self::new("assistant", content) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_keep_their_tags_but_for_channels() {
        let tagged = "<think>hm</think>\n<tool_call>{\"name\": \"f\"}</tool_call><|tool_call_end|>";
        assert_eq!(ChatMessage::reply(tagged), ChatMessage::new("assistant", tagged));
        let channels = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>A < B.";
        let reply = ChatMessage::reply(channels);
        assert_eq!((reply.content.as_str(), reply.thinking.as_deref()), ("A < B.", Some("Let me see.")));
        // Cut off while it thinks.
        let cut = ChatMessage::reply("<|channel|>analysis<|message|>Let");
        assert_eq!((cut.content.as_str(), cut.thinking.as_deref()), ("", Some("Let")));
        assert_eq!(ChatMessage::reply("<|channel|>").content, "");
        let json = serde_json::to_value(ChatMessage::new("user", "a")).unwrap();
        assert_eq!(json, serde_json::json!({"role": "user", "content": "a"}));
    }
}
